"""An AWS account in a process of its own, which outlives a killed session: `python -m tests.aws.moto_server`."""

from __future__ import annotations

import logging

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.aws import moto_eks


def main() -> None:
    """Serve on a free port of loopback, say which, until killed."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto_eks.install()
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
