"""The ``moefx`` command: one file per subcommand; torch is imported only when a command needs it."""

from __future__ import annotations

from moefx.cli.bisect import bisect
from moefx.cli.calibrate import calibrate
from moefx.cli.codegen import codegen
from moefx.cli.doctor import doctor
from moefx.cli.dump import dump
from moefx.cli.frame import app, main
from moefx.cli.place import place
from moefx.cli.plan import plan
from moefx.cli.recipes import recipes
from moefx.cli.sites import sites
from moefx.cli.topology import topology
from moefx.cli.trace import trace
from moefx.cli.transform import transform
from moefx.cli.verify import verify

for _command in (
    dump,
    sites,
    calibrate,
    plan,
    transform,
    verify,
    bisect,
    codegen,
    topology,
    trace,
    place,
    recipes,
    doctor,
):
    app.command()(_command)

__all__ = ["app", "main"]
