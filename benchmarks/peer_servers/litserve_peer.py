"""LitServe as its documentation sets up batching: one worker for the device, ``max_batch_size``, ``batch_timeout``."""

import sys
from typing import Any

import litserve
from sampler import Ask, Sampler, Setup


class StudentApi(litserve.LitAPI):  # type: ignore[misc]  # LitServe is not installed where types are checked
    """The student."""

    configuration: Setup

    def setup(self, device: str) -> None:
        """Load it, in the worker."""
        self._sampler = Sampler(self.configuration)

    def decode_request(self, request: dict[str, Any]) -> Ask:
        """One request."""
        return self._sampler.ask(request["prompt"], request["seed"], request.get("num_inference_steps"))

    def batch(self, inputs: list[Ask]) -> list[Ask]:
        """A batch is a list."""
        return inputs

    def predict(self, asks: list[Ask]) -> list[str]:
        """One batch."""
        return self._sampler(asks)

    def unbatch(self, output: list[str]) -> list[str]:
        """And so is its result."""
        return output

    def encode_response(self, output: str) -> dict[str, Any]:
        """One answer."""
        return {"data": [{"b64_json": output}]}


if __name__ == "__main__":
    setup = Setup.parse(sys.argv[1])
    api = StudentApi(max_batch_size=setup.max_batch, batch_timeout=0.01, api_path="/v1/images/generations")
    api.configuration = setup  # goes to the worker with it
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=120)
    server.run(host="127.0.0.1", port=setup.port, generate_client_file=False, log_level="warning", access_log=False)
