"""Small trained additions to a frozen network, and what is exported of them."""
