"""What an adapter is and which layers it is put on, in the words of peft."""
