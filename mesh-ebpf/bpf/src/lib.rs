//! `mesh_datapath`, adapted to XDP and TC contexts and to maps.
//!
//! All decisions are the library's. What is here reads and writes packets and maps, and carries a verdict out with
//! the kernel's helpers: redirects, tunnel keys, route lookups, counters. Written for kernel 6.1 and later.
//!
//! Two binaries use it: `shoal-bpf`, the programs of the agent, and `shoal-probe`, which tests and benchmarks load
//! beside them.
#![no_std]
#![feature(asm_experimental_arch)]

pub mod act;
pub mod bounds;
pub mod hook;
pub mod maps;
pub mod next_hop;
pub mod reuse;
pub mod socket;
pub mod tc;
pub mod xdp;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier proves that no program gets here: it refuses an endless loop.
    loop {}
}
