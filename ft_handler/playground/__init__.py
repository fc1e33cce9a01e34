"""A page to look at: a small local server that shows it and passes its requests on."""
