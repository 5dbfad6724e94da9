"""Data-parallel training from scratch, on processes and pipes alone: to read, and to compare.

    param_server.py     a server holds the model; workers compute gradients for it
    ring_all_reduce.py  no server: gradients travel round a ring of equals
    ddp.py              torch's DistributedDataParallel, for comparison
    data_parallel.py    torch's DataParallel, for comparison: one process, several GPUs
    task.py             what is trained: the data, the network, a replica with its shard
    processes.py        starts the processes, hears from them, and ends all when one fails
    meter.py            where a process's seconds go, and how many bytes it sends
    report.py           the tables
    __main__.py         the command: `python -m from_scratch --strategy ring_all_reduce`

A strategy is a module with two functions. `peers(n)` names the processes, and says what each one
communicates through; `train(peer, task, link)` is what each of them then does, and returns its
final weights.

All strategies see the same images in each update, start from the same weights and step with the
same gradient, that of the joint batch. What they differ in is who talks to whom.
"""
