"""The Python client of a Grokmesh service.

    from grokmesh import Client

    with Client("127.0.0.1:50051") as client:
        for part in client.generate("In the beginning", max_tokens=64, temperature=0.7):
            print(part.text, end="")

`AsyncClient` has the same methods for asyncio, but for those of operators. A call that fails with UNAVAILABLE is tried again
with growing pauses (at least as long as the server asks for). A stream that broke goes on after what it has brought, at
whichever gateway answers. Any other error is raised as grpc.RpcError. An address may list several gateways, as gRPC has it:
`ipv4:10.0.0.1:50051,10.0.0.2:50051`. Where the service wants API keys, give yours as `api_key`; where it has a certificate,
name its authority as `tls`.
"""

from grokmesh.channel import DEFAULT_ADDRESS, ClientError, Tls
from grokmesh.client import AsyncClient, Client
from grokmesh.completions import Completion, Options, ScoredText, ScoredToken, Token, completion_request

__all__ = [
    "DEFAULT_ADDRESS", "AsyncClient", "Client", "ClientError", "Completion", "Options", "ScoredText", "ScoredToken",
    "Tls", "Token", "completion_request",
]  # fmt: skip
