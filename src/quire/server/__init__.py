"""HTTP: `serve.py` runs it, `app.py` is the page to read. pydantic and FastAPI live here and nowhere else."""
