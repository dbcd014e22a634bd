"""What can be asked: each module gives documents, prompts, references and the name of a scorer."""
