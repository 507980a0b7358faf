"""`mmray serve`: the endpoint."""

import argparse
import os
from typing import Any

from mmray.commands.flags import settings


def register(commands: Any) -> None:
    """Adds these commands to the parser."""
    _add_serve(commands)


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="answer over HTTP with the same scores",
        description="Answer POST /v1/score with the predictor that scores tables. MMRAY_TOKEN in the environment asks "
        "every request for that bearer token. Ctrl-C ends it.",
    )
    serve.add_argument("bundle", metavar="BUNDLE")
    serve.add_argument("--host", help="address to listen on (default: 127.0.0.1, this machine only)")
    serve.add_argument("--port", type=int, help="default: 8000")
    serve.add_argument("--replicas", type=int, metavar="N", help="processes (default: 1)")
    serve.add_argument("--gpus", type=float, metavar="N", help="GPUs of each (default: 0)")
    serve.add_argument("--precision", choices=["auto", "bf16", "fp32"], help="default: fp32")
    serve.add_argument(
        "--image-root",
        action="append",
        metavar="DIR",
        help="let requests name images in this folder or beneath this URL; repeatable (default: uploads only)",
    )
    serve.add_argument("--max-items", type=int, metavar="N", help="most items in a request (default: 64)")
    serve.add_argument("--tls-cert", metavar="PEM", help="answer over HTTPS, with this certificate")
    serve.add_argument("--tls-key", metavar="PEM", help="the certificate's private key")
    serve.add_argument(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        help="let pages of this origin call from a browser; repeatable (default: none)",
    )
    serve.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    from mmray.serve.app import serve_forever

    def on_ready(url: str, metrics: str) -> None:
        print(f"ready at {url}; metrics for Prometheus at {metrics}", flush=True)

    serve_forever(args.bundle, _serve_config(args), on_ready=on_ready)


def _serve_config(args: argparse.Namespace) -> Any:
    from mmray.serve.settings import ServeConfig

    fields = {
        "image_root": "image_roots",
        "cors_origin": "cors_origins",
        "replicas": "num_replicas",
        "gpus": "gpus_per_replica",
    }
    return settings(ServeConfig, args, fields, token=os.environ.get("MMRAY_TOKEN") or None)
