"""Statistics and linear algebra: averages over steps, their errors, tests of stationarity."""
