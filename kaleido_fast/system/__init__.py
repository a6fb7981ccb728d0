"""The machine and what runs beside us: devices, threads, workers, files, locks, versions."""
