"""Bundle + observations -> commands. Runs on the robot: numpy, one engine backend, tokenizers, pydantic."""
