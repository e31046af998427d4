"""The HTTP server: doors in front of one engine. Floor 4; it imports the runtime and never training or export.

app         the FastAPI application and its routes; gate stands before it
connection  the short way past both, for the generation requests that are simple
images      the OpenAI images protocol
kserve      the Open Inference Protocol over HTTP, and kserve_grpc over gRPC; inference is what they mean
generation  what all protocols share: from what a person means to samples, previews and errors
service     the students being served: engines, their thread, the encoders
settings    everything that can be configured, one frozen object
"""

from .app import create_app
from .service import Service
from .settings import Settings, SettingsError
from .uvicorn_server import serve

__all__ = ["Service", "Settings", "SettingsError", "create_app", "serve"]
