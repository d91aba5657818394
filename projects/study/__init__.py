"""A study at small scale: what each method buys on generated shapes."""
