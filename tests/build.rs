//! Builds the probe programs that the packet tests and benchmarks load, as `$OUT_DIR/shoal.bpf.o`.

fn main() {
    if let Err(error) = ebpf_build::build_script::run("shoal-probe") {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
