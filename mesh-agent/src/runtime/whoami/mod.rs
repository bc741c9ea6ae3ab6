//! `shoal internal whoami`: the built-in image `shoal/whoami`, a server that tells who answered and what it saw.
//!
//! HTTP/1.1 and a UDP echo on the same port, in both address families; 80 unless `--port` or the environment's `PORT`
//! says otherwise. On SIGTERM it finishes the requests in flight, still answering those that come in meanwhile, and
//! ends.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UdpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

mod http;
mod udp;

/// How long requests in flight are waited for; Docker's default grace period less a little.
const DRAIN: Duration = Duration::from_secs(8);
/// Without a connection for this long, a draining server has nothing left to wait for.
const QUIET: Duration = Duration::from_millis(100);

/// Who the server is, from its environment.
#[derive(Debug)]
struct Identity {
    task: String,
    task_id: String,
    service: String,
    node: String,
}

impl Identity {
    fn from_env() -> Self {
        let get = |key| std::env::var(key).unwrap_or_else(|_| "-".to_owned());
        Self {
            task: get("SHOAL_TASK_NAME"),
            task_id: get("SHOAL_TASK_ID"),
            service: get("SHOAL_SERVICE"),
            node: get("SHOAL_NODE"),
        }
    }
}

/// Serves until SIGTERM or SIGINT; the arguments are read from the command line.
pub fn main() -> ExitCode {
    match port(std::env::args().skip_while(|arg| arg != "whoami").skip(1), std::env::var("PORT").ok()) {
        Ok(port) => run(port),
        Err(text) => {
            eprintln!("whoami: {text}");
            ExitCode::from(2)
        }
    }
}

fn port(mut args: impl Iterator<Item = String>, from_env: Option<String>) -> Result<u16, String> {
    let mut text = from_env.filter(|text| !text.is_empty());
    while let Some(arg) = args.next() {
        text = match arg.split_once('=') {
            Some(("--port", value)) => Some(value.to_owned()),
            None if arg == "--port" => Some(args.next().ok_or("--port needs a number")?),
            _ => return Err(format!("unknown argument {arg:?}: the only one is --port NUMBER")),
        };
    }
    match text {
        None => Ok(80),
        Some(text) => text.parse().map_err(|_| format!("{text:?} is not a port: give a number up to 65535")),
    }
}

fn run(port: u16) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("whoami: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(serve(port)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("whoami: cannot serve on port {port}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Listens for IPv6 and IPv4 at once, or for IPv4 alone where the kernel has no IPv6. A task's network namespace has
/// `net.ipv6.bindv6only` off.
async fn listen(port: u16) -> io::Result<(TcpListener, UdpSocket)> {
    let bind = async |addr: SocketAddr| Ok((TcpListener::bind(addr).await?, UdpSocket::bind(addr).await?));
    match bind((Ipv6Addr::UNSPECIFIED, port).into()).await {
        Err(error) if has_no_ipv6(&error) => bind((Ipv4Addr::UNSPECIFIED, port).into()).await,
        bound => bound,
    }
}

fn has_no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

/// An address as people write it: one of IPv4 is not `::ffff:192.0.2.1`, which is what a socket for both families sees.
fn plain_address(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

async fn serve(port: u16) -> io::Result<()> {
    let (listener, socket) = listen(port).await?;
    let identity = Arc::new(Identity::from_env());
    println!("{} serves on port {port}", identity.task);

    let (draining, drain) = watch::channel(false);
    // Counts the connections: each holds a receiver.
    let http = tokio::spawn(http::serve(listener, Arc::clone(&identity), drain.clone()));
    let udp = tokio::spawn(udp::serve(socket, identity));
    drop(drain);

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = draining.send(true);
    let _ = tokio::time::timeout(DRAIN, until_quiet(&draining)).await;
    http.abort();
    udp.abort();
    Ok(())
}

/// Waits until nobody but the accept loop has held a receiver for [`QUIET`].
async fn until_quiet(draining: &watch::Sender<bool>) {
    loop {
        if draining.receiver_count() <= 1 {
            tokio::time::sleep(QUIET).await;
            if draining.receiver_count() <= 1 {
                return;
            }
        }
        tokio::time::sleep(QUIET / 10).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(args: &[&str], env: Option<&str>) -> Result<u16, String> {
        port(args.iter().map(|arg| (*arg).to_owned()), env.map(str::to_owned))
    }

    #[tokio::test]
    async fn it_listens_on_both_families_and_names_addresses_plainly() {
        let (listener, socket) = listen(0).await.unwrap();
        for ip in ["127.0.0.1", "::1"] {
            let server = SocketAddr::new(ip.parse().unwrap(), listener.local_addr().unwrap().port());
            let client = tokio::net::TcpStream::connect(server).await.unwrap();
            let (_, seen) = listener.accept().await.unwrap();
            assert_eq!(plain_address(seen), client.local_addr().unwrap());

            let client = UdpSocket::bind((server.ip(), 0)).await.unwrap();
            client.send_to(b"x", (server.ip(), socket.local_addr().unwrap().port())).await.unwrap();
            let (_, seen) = socket.recv_from(&mut [0; 8]).await.unwrap();
            assert_eq!(plain_address(seen), client.local_addr().unwrap());
        }
    }

    #[test]
    fn the_port_comes_from_the_arguments_then_the_environment() {
        assert_eq!(given(&[], None), Ok(80));
        assert_eq!(given(&[], Some("81")), Ok(81));
        assert_eq!(given(&["--port", "82"], Some("81")), Ok(82));
        assert_eq!(given(&["--port=83"], None), Ok(83));
        for wrong in [&["--port"][..], &["--port", "x"], &["--prot", "1"], &["--port=65536"]] {
            assert!(given(wrong, None).is_err(), "{wrong:?}");
        }
    }
}
