"""Tasks of `gigabatch eval`, one module each; `registry.all_tasks` imports every module here."""
