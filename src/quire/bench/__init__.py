"""`quire bench NAME`: each benchmark is a module here with HELP, add_arguments(parser) and run(args)."""
