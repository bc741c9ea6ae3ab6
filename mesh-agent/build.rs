//! Builds the BPF object that the agent embeds, as `$OUT_DIR/shoal.bpf.o`; ebpf-build says with what, and when it is a stub.

fn main() {
    if let Err(error) = ebpf_build::build_script::run(ebpf_build::PRODUCT) {
        // Words on stderr rather than a `Debug` print from main: cargo shows them below the compiler's own.
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
