"""Checks what is deployed, as far as that can be done without deploying it. `cargo xtask deploy` runs it.

    python check.py compose      compose.yaml by a reader of the Compose Specification, and what it mounts
    python check.py collector    config.yaml: every pipeline's parts are there
"""
import pathlib
import re
import sys

import compose_spec
import yaml

HERE = pathlib.Path(__file__).parent


def compose():
    file = HERE / "compose" / "compose.yaml"
    composed = yaml.safe_load(file.read_text())
    # What the environment doesn't say is as compose itself would have it.
    filled = re.sub(r"\$\{\w+:-([^}]*)\}|\$\{\w+:\?[^}]*\}", lambda m: m.group(1) or "set", yaml.safe_dump(composed))
    read = compose_spec.PyCompose.from_yaml(filled)
    read.validate()
    assert set(read.service_names()) == set(composed["services"])
    services, volumes = composed["services"], composed["volumes"]
    for name, service in services.items():
        for other in service.get("depends_on", {}):
            assert other in services, f"{name} depends on {other}, which isn't there"
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (file.parent / source).exists(), f"{name} mounts {source}, which isn't there"
            else:
                assert source in volumes, f"{name} mounts {source}, which no volume is"
        build = service.get("build")
        if build:
            context = file.parent / build["context"]
            assert (context / build["dockerfile"]).is_file(), f"{name} is built from no file"
    print(f"compose.yaml: {len(services)} services fit the specification")


def collector():
    config = yaml.safe_load((HERE / "collector" / "config.yaml").read_text())
    used = {kind: set() for kind in ("receivers", "processors", "exporters")}
    for name, pipeline in config["service"]["pipelines"].items():
        assert pipeline["receivers"] and pipeline["exporters"], name
        # By its documentation the limiter comes first and batches last.
        steps = pipeline["processors"]
        assert steps[0] == "memory_limiter" and steps[-1] == "batch", name
        for kind, names in used.items():
            names.update(pipeline[kind])
    for kind, names in used.items():
        assert names == set(config[kind]), f"{kind}: {names} are used, {set(config[kind])} are there"
    assert set(config["service"]["extensions"]) == set(config["extensions"])
    print("collector/config.yaml: its pipelines are whole")


{"compose": compose, "collector": collector}[sys.argv[1]]()
