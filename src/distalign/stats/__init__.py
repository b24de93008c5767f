"""Numbers with their error: intervals and tests, text metrics, ratings, calibration, logistic regression."""
