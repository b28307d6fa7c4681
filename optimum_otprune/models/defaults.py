"""How passes are made where nobody says otherwise; imports nothing, for the command line shows it."""

BATCH_SIZE = 8  # samples per forward pass
HIDDEN_MEMORY = 4 * 10**9  # bytes of hidden states that wait in main memory; others wait in files
