"""`jaxlora bench`: training steps and kernels of real models' shapes, timed on this machine.

Every measurement runs in a process of its own, since a device's peak memory is the process's. `command` starts them and
imports nothing that would take the device for itself.
"""
