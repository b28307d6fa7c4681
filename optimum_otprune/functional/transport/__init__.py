"""Transport plans and the solvers behind them."""
