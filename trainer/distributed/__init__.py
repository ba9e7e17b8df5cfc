"""The processes of a run: rendezvous, collectives, signals, logs, files for the job script."""
