//! A guest: QEMU, and the server of the host's files. Both end with the value that holds them.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::kernels::Kernel;
use super::{console, initrd, nics};
use crate::setup::VmPrograms;
use crate::{bounded, run};

/// How long a guest under KVM may take until its first process runs; one or two seconds are usual.
const KVM_LIMIT: Duration = Duration::from_secs(10);
const MEMORY: &str = "2G";
const CPUS: &str = "2";

/// What runs the guest's instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU, by translating them: 10 to 30 times slower.
    Tcg,
}

impl Accelerator {
    /// KVM if a guest comes up under it: that there is a /dev/kvm doesn't say so on a machine that is virtual itself.
    pub(super) fn find(kernel: &Kernel, folder: &Path, programs: &VmPrograms) -> Result<Self> {
        if File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Self::Tcg);
        }
        let initrd = initrd::build_probe(programs)?;
        let Ok(machine) = Machine::boot(Self::Kvm, kernel, &initrd, false, folder, programs) else {
            return Ok(Self::Tcg);
        };
        let started = Instant::now();
        while let Some(left) = KVM_LIMIT.checked_sub(started.elapsed()) {
            match machine.output.recv_timeout(left) {
                Ok(line) if line == "@booted" => return Ok(Self::Kvm),
                Ok(_) => {}
                Err(_) => break,
            }
        }
        Ok(Self::Tcg)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "KVM",
            Self::Tcg => "TCG",
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => &["-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max,-la57"],
        }
    }
}

/// A running guest.
pub(super) struct Machine {
    processes: Vec<Child>,
    /// What the guest's programs print, by lines; ends with the guest.
    pub(super) output: Receiver<String>,
    /// What its kernel prints.
    pub(super) console: PathBuf,
}

impl Machine {
    /// Starts a guest, with the host's files and network interfaces if it is to have any. Its files are in `folder`.
    pub(super) fn boot(
        accelerator: Accelerator,
        kernel: &Kernel,
        initrd: &[u8],
        has_devices: bool,
        folder: &Path,
        programs: &VmPrograms,
    ) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("could not create {}", folder.display()))?;
        let initrd_path = folder.join("initrd");
        fs::write(&initrd_path, initrd)?;
        let console = folder.join("console.log");
        fs::write(&console, "")?;
        let (sender, output) = mpsc::channel();
        let mut machine = Self { processes: Vec::new(), output, console };

        let mut qemu = bound_to_this(&programs.path("qemu-system-x86_64")?, programs);
        qemu.arg("-L").arg(programs.firmware()).args(accelerator.arguments());
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-smp",
            CPUS,
            "-m",
            MEMORY,
        ]);
        qemu.args(["-object", &format!("memory-backend-memfd,id=mem,size={MEMORY},share=on")]);
        qemu.args(["-machine", "q35,memory-backend=mem"]);
        qemu.args([
            "-object",
            "rng-random,id=rng0,filename=/dev/urandom",
            "-device",
            "virtio-rng-pci,rng=rng0",
        ]);
        // The first serial line is the kernel's, the second the programs': neither breaks the other's lines.
        qemu.args(["-serial", &format!("file:{}", machine.console.display()), "-serial", "stdio"]);
        qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&initrd_path);
        qemu.args([
            "-append",
            "console=ttyS0 loglevel=5 panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check",
        ]);
        if has_devices {
            let socket = folder.join("files.sock");
            let server = serve_files(&socket, folder, programs)?;
            machine.processes.push(server);
            bounded::until("the server of the host's files listens", Duration::from_secs(20), || {
                Ok(socket.exists().then_some(()))
            })?;
            qemu.args(["-chardev", &format!("socket,id=files,path={}", socket.display())]);
            qemu.args(["-device", "vhost-user-fs-pci,chardev=files,tag=host,queue-size=256"]);
            qemu.args(nics::devices());
        }
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(folder.join("qemu.log"))?);
        let mut child = qemu.spawn().with_context(|| format!("could not start {}", run::line(&qemu)))?;
        let lines = child.stdout.take();
        machine.processes.push(child);
        std::thread::spawn(move || {
            let Some(lines) = lines else { return };
            for line in BufReader::new(lines).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(machine)
    }

    /// What there is to say of a guest whose output has ended.
    pub(super) fn why_it_ended(&self) -> String {
        let said = fs::read_to_string(self.console.with_file_name("qemu.log")).unwrap_or_default();
        let said: Vec<&str> = said.lines().filter(|line| !line.contains(": warning: ")).collect();
        self.complaint()
            .unwrap_or_else(|| format!("the guest has ended. {}", said.join("\n")).trim_end().to_owned())
    }

    /// The line that tells that the guest is lost, if its kernel printed one.
    pub(super) fn complaint(&self) -> Option<String> {
        console::complaint(&console::read(&self.console)).map(str::to_owned)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // QEMU first: without its files a guest would only complain.
        for mut child in self.processes.drain(..).rev() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Serves this machine's files to one guest, which mounts them read-only.
fn serve_files(socket: &Path, folder: &Path, programs: &VmPrograms) -> Result<Child> {
    if socket.exists() {
        fs::remove_file(socket)?;
    }
    let mut command = bound_to_this(&programs.path("virtiofsd")?, programs);
    command.args(["-f", &format!("--socket-path={}", socket.display())]);
    for option in ["source=/", "sandbox=chroot", "cache=always", "xattr", "log_level=err"] {
        command.args(["-o", option]);
    }
    let log = File::create(folder.join("files.log"))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("could not start {}", run::line(&command)))
}

/// A program that the kernel ends with this process, however that ends, and that hears nothing of Ctrl-C.
fn bound_to_this(program: &Path, programs: &VmPrograms) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).process_group(0);
    command.env("LD_LIBRARY_PATH", programs.library_path());
    command
}
