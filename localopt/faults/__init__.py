"""What goes wrong between ranks: layouts that differ, ranks that die, hang, stop or must stop."""
