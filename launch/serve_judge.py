"""An InternVL behind an OpenAI-compatible server of vLLM, on loopback, for judges with `backend: http`.

    python launch/serve_judge.py rlpipe/world/assets/judge --port 8000 --dtype float32
    python launch/serve_judge.py InternVL2_5-26B-hf --dtype bfloat16 --tensor-parallel-size 2 --max-model-len 8192

Everything that is not listed below goes to vLLM. The model's name on the server is judge. It answers as the other
backends do: the server gets the chat template and, where the checkpoint has none, the image processor (docs/vllm.md).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", help="checkpoint folder of transformers' InternVL")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="127.0.0.1 is reached from this machine alone")
    parser.add_argument("--images", type=int, default=2, help="most images in one question")
    parser.add_argument("--max-tiles", type=int, default=12, help="most tiles of an image, its thumbnail not counted")
    arguments, rest = parser.parse_known_args(argv)

    import torch

    from rlpipe.reward.serving import CPU_KV_CACHE_BYTES, SERVER, engine_environment, serving_folder

    options = ["--served-model-name", "judge", "--host", arguments.host, "--port", str(arguments.port)]
    options += ["--limit-mm-per-prompt", json.dumps({"image": arguments.images, "video": 0})]
    options += ["--generation-config", "vllm"]
    if not torch.cuda.is_available():
        options += ["--enforce-eager", "--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES)]
    with tempfile.TemporaryDirectory(prefix="rlpipe-serve-") as folder:
        try:
            serving_folder(arguments.path, folder, arguments.max_tiles)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        server = subprocess.Popen(
            [sys.executable, "-m", SERVER, "--model", folder, *options, *rest], env=engine_environment() | os.environ
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: server.terminate())
        return server.wait()


if __name__ == "__main__":
    sys.exit(main())
