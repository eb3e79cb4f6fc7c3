"""Mobile VLA: a backbone sees each frame of a window by itself, an LSTM reads the window."""
