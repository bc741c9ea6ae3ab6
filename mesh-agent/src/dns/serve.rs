//! The sockets that tasks ask at.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::answer::{Answerer, Outcome, Transport};
use super::turns::Turns;

/// Longest question, bytes: one name and a few options.
const QUESTION_BYTES_MAX: usize = 4096;
/// How long a TCP connection may idle, or not take its answer.
const TCP_IDLE: Duration = Duration::from_secs(10);
/// TCP connections of one task.
const TCP_PER_TASK_MAX: usize = 16;
/// TCP connections of all tasks.
const TCP_ALL_MAX: usize = 512;
/// How long a socket that fails is left alone: it fails for want of what others may give back.
const RESPITE: Duration = Duration::from_millis(100);

/// Answers datagrams; what this node knows, in turn, and what others are asked, when they have answered.
pub(super) async fn udp(socket: UdpSocket, answerer: Arc<Answerer>) {
    let socket = Arc::new(socket);
    let mut forwarded = JoinSet::new();
    let mut buffer = vec![0; QUESTION_BYTES_MAX];
    loop {
        while forwarded.try_join_next().is_some() {}
        let (len, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                debug!(%error, "a question can't be received");
                sleep(RESPITE).await;
                continue;
            }
        };
        match answerer.take(client.ip(), &buffer[..len], Transport::Udp) {
            Outcome::Ignored => {}
            Outcome::Answered(answer) => send(&socket, client, &answer).await,
            Outcome::Forwarded(forwarding) => {
                let socket = Arc::clone(&socket);
                forwarded.spawn(async move { send(&socket, client, &forwarding.answer().await).await });
            }
        }
    }
}

async fn send(socket: &UdpSocket, client: SocketAddr, answer: &[u8]) {
    if let Err(error) = socket.send_to(answer, client).await {
        debug!(%error, %client, "an answer could not be sent");
    }
}

/// Answers on connections, one question of each at a time.
pub(super) async fn tcp(listener: TcpListener, answerer: Arc<Answerer>) {
    let turns = Turns::new(TCP_PER_TASK_MAX, TCP_ALL_MAX);
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let (stream, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                debug!(%error, "a connection can't be accepted");
                sleep(RESPITE).await;
                continue;
            }
        };
        // A connection of nobody, or one too many, is closed.
        let Some(turn) = answerer.task_at(client.ip()).and_then(|task| turns.take(task)) else { continue };
        let answerer = Arc::clone(&answerer);
        connections.spawn(async move {
            if let Err(error) = converse(stream, client, &answerer).await {
                debug!(%error, %client, "a connection ended");
            }
            drop(turn);
        });
    }
}

async fn converse(mut stream: TcpStream, client: SocketAddr, answerer: &Arc<Answerer>) -> io::Result<()> {
    let mut buffer = vec![0; QUESTION_BYTES_MAX];
    loop {
        let len = timeout(TCP_IDLE, read(&mut stream, &mut buffer)).await??;
        let answer = match answerer.take(client.ip(), &buffer[..len], Transport::Tcp) {
            Outcome::Ignored => return Ok(()),
            Outcome::Answered(answer) => answer,
            Outcome::Forwarded(forwarding) => forwarding.answer().await,
        };
        let len = u16::try_from(answer.len()).map_err(io::Error::other)?;
        timeout(TCP_IDLE, stream.write_all(&[&len.to_be_bytes(), &answer[..]].concat())).await??;
    }
}

/// Reads a question; its length.
async fn read(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let len = usize::from(stream.read_u16().await?);
    let question = buffer.get_mut(..len).ok_or(io::ErrorKind::InvalidData)?;
    stream.read_exact(question).await
}
