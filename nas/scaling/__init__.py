"""Does a gain survive scale: a ladder of sizes, its laws, and what is read off them."""
