"""The training program behind main.py.

    config.py         the table of settings; settings.py how flags, recipe and host file become one
    distributed.py    rank, device and process group of this process; launchers.py who started it
    run.py, loop.py   a run put together from its settings; how it trains
    engine.py         what a training step is; deepspeed_*.py what DeepSpeed does of it
    optimizers.py     the optimizer asked for, rules and periods from named.py; lr.py its rates
    models.py         models by name; methods.py what composer changes in training
    checks.py         what settings must have in common with replicas, images and model
    record.py         what is recorded; loggers.py where it goes, run_folder.py what it ran with
    checkpoint/       saving, resuming, exporting
    plan/, report/    ``main.py --plan`` before a run, ``python -m training.report`` after it
"""
