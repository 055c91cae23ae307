"""What clients may send. One pydantic model per endpoint; every bound of every field is here."""
