"""Eight CPU devices for every test, so that meshes need no hardware."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
