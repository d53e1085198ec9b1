"""The proof: one test file for each module, journeys named by what they show."""
