"""The commands: each turns its flags into settings, calls one function of the library, and prints what it did."""
