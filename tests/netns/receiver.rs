//! A task's program that knows whom it is: what comes and was meant for another service goes into a file.
//!
//! What is sent to it begins with the name of the service that it is for. It answers with its own, and with what came.

use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

/// The port that it listens at, TCP and UDP.
pub(crate) const PORT: u16 = 80;
/// What has this program be a receiver, before the path of the file.
const WORD: &str = "receive";

/// What runs it in a task, with strays put into `strays`.
pub(crate) fn command(strays: &Path) -> Result<[String; 3]> {
    let own = std::env::current_exe()?.display().to_string();
    Ok([own, WORD.to_owned(), strays.display().to_string()])
}

/// Receives, if the command line says so, until it is killed.
pub(crate) fn main() -> Option<ExitCode> {
    let mut words = std::env::args().skip(1);
    let strays = (words.next()? == WORD).then(|| words.next()).flatten()?;
    Some(match receive(PathBuf::from(strays)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

/// The task, and where it puts what is not for it.
struct Receiver {
    service: String,
    task: String,
    strays: PathBuf,
}

impl Receiver {
    /// Checks what came, and gives the answer.
    fn take(&self, came: &str, from: SocketAddr) -> Result<String> {
        let Self { service, task, strays } = self;
        if came.split_whitespace().next() != Some(service) {
            let mut file = OpenOptions::new().create(true).append(true).open(strays)?;
            // In one piece: others write as well.
            file.write_all(format!("task {task} of {service} got {came:?} from {from}\n").as_bytes())?;
        }
        Ok(format!("{service} {came}"))
    }

    fn converse(&self, stream: &TcpStream, from: SocketAddr) -> Result<()> {
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut line = String::new();
        if BufReader::new(stream).read_line(&mut line)? == 0 {
            // Its client gave up just when it was connected: whom it meant, nobody knows.
            return Ok(());
        }
        let answer = self.take(line.trim_end(), from)?;
        (&mut &*stream).write_all(format!("{answer}\n").as_bytes())?;
        Ok(())
    }
}

fn receive(strays: PathBuf) -> Result<()> {
    let own = |name| std::env::var(name).with_context(|| format!("a task has {name}"));
    let receiver = Receiver { service: own("SHOAL_SERVICE")?, task: own("SHOAL_TASK_ID")?, strays };
    let receiver = Arc::new(receiver);
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
    let by_tcp = Arc::clone(&receiver);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // How a connection ends is its client's business.
            let _ = stream.peer_addr().map(|from| by_tcp.converse(&stream, from));
        }
    });
    let mut data = [0; 512];
    loop {
        // An error is an ICMP message about an earlier answer.
        let Ok((len, from)) = socket.recv_from(&mut data) else { continue };
        let answer = receiver.take(&String::from_utf8_lossy(&data[..len]), from)?;
        let _ = socket.send_to(answer.as_bytes(), from);
    }
}
