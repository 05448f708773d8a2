"""What a cluster needs before `ray up` starts it."""
