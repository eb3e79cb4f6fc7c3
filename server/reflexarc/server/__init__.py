"""serve-policy: a checkpoint behind websocket and HTTP."""
