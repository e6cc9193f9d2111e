"""`launcher check`: a recipe's own runs, compared, until they prove it distributed-correct or name what is not."""
