"""Memory and seconds of a run in every role, before anything is loaded: `python launch/plan.py --config FILE`

python launch/plan.py --config configs/janus_pro_7b_grpo.yaml --model configs/models/janus_pro_7b.json --device h100

Exit status 1: something does not fit; 2: the configuration or the model cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys

from rlpipe.config import DEFAULT_CONFIG, Config, ConfigError, load_config
from rlpipe.paths import ROOT, resolve_path


def main() -> int:
    arguments = parse()
    try:
        config = load_config(arguments.config, arguments.overrides)
        # Torch is loaded only for a configuration that can be read.
        from rlpipe.policy.devices import device, efficiencies
        from rlpipe.policy.forecast import forecast_json, forecast_table, make_forecast
        from rlpipe.policy.plan import meta_model, plan_json, plan_of, plan_table

        name = arguments.device or ("h100" if on_gpus(config) else "cpu")
        place = device(name).given(arguments.flops, arguments.bandwidth, arguments.memory)
        path = resolve_path(arguments.model or config.policy.path)
        model = meta_model(path)
        plan = plan_of(config, model, str(path))
        forecast = make_forecast(config, model, place, efficiencies(name, ROOT / "benchmarks" / "results"))
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(plan_json(plan, arguments.parameters) | {"forecast": forecast_json(forecast)}, indent=1))
    else:
        print(plan_table(plan, arguments.parameters), forecast_table(forecast), sep="\n\n")
    return 1 if forecast.problems else 0


def on_gpus(config: Config) -> bool:
    sections = (config.rollout, config.reference, config.learner, *config.reward)
    return any(section.num_gpus > 0 for section in sections)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--model", metavar="PATH", help="config.json or checkpoint folder; default: policy.path")
    parser.add_argument("--device", help="h200, h100, a100 or cpu; default: h100, cpu where no role asks for a GPU")
    parser.add_argument("--flops", type=float, help="operations per second of large products, for the table's")
    parser.add_argument("--bandwidth", type=float, help="bytes per second of the device's memory, for the table's")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of the device, for the table's")
    parser.add_argument("--parameters", action="store_true", help="list every parameter, not only the parts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. learner.ranks=8")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
