"""Small studies that run on one machine; each writes CSV to results/ and prints its table."""
