"""The engine over HTTP: OpenAI's endpoints, bounded and safe without flags. Read `app.py` first."""
