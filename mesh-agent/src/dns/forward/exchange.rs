//! One question to one resolver.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::timeout;

use super::question::{Question, decode};

/// How long after a datagram it is sent again: it, or its answer, may have been lost.
const RESEND: Duration = Duration::from_secs(1);
/// Longest answer taken by UDP, bytes: some resolvers don't care how much was asked for.
const UDP_BYTES_MAX: usize = 4096;

/// Asks `server`. Goes on for as long as it is silent; the caller sets the limit.
pub(super) async fn exchange(server: SocketAddr, question: &Question) -> io::Result<Message> {
    let answer = ask(server, &question.message(true)).await?;
    if answer.metadata.response_code == ResponseCode::FormErr && answer.edns.is_none() {
        // It does not know EDNS (RFC 6891, 7).
        return ask(server, &question.message(false)).await;
    }
    Ok(answer)
}

async fn ask(server: SocketAddr, question: &Message) -> io::Result<Message> {
    let source = source_for(server).await?;
    let answer = ask_from(source, server, question).await;
    let is_here = server.ip().is_loopback() || server.ip() == source.ip();
    match answer {
        // Nobody on this host listens there. If the port is published, the name server is a service.
        Err(error) if is_here && error.kind() == io::ErrorKind::ConnectionRefused => {
            ask_from(unbound(server), server, question).await
        }
        answer => answer,
    }
}

async fn ask_from(source: SocketAddr, server: SocketAddr, question: &Message) -> io::Result<Message> {
    let bytes = question.to_vec().map_err(io::Error::other)?;
    let answer = ask_udp(source, server, question, &bytes).await?;
    if answer.metadata.truncation { ask_tcp(source, server, question, &bytes).await } else { Ok(answer) }
}

async fn ask_udp(
    source: SocketAddr,
    server: SocketAddr,
    question: &Message,
    bytes: &[u8],
) -> io::Result<Message> {
    // At a port of the kernel's choice, at random; connected, so that it hears nobody else.
    let socket = UdpSocket::bind(source).await?;
    socket.connect(server).await?;
    let mut buffer = vec![0; UDP_BYTES_MAX];
    loop {
        socket.send(bytes).await?;
        if let Ok(answer) = timeout(RESEND, hear(&socket, question, &mut buffer)).await {
            return answer;
        }
    }
}

async fn hear(socket: &UdpSocket, question: &Message, buffer: &mut [u8]) -> io::Result<Message> {
    loop {
        let len = socket.recv(buffer).await?;
        // Anything else is late, or forged.
        if let Ok(answer) = decode(&buffer[..len], question) {
            return Ok(answer);
        }
    }
}

async fn ask_tcp(
    source: SocketAddr,
    server: SocketAddr,
    question: &Message,
    bytes: &[u8],
) -> io::Result<Message> {
    let socket = if server.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.bind(source)?;
    let mut stream = socket.connect(server).await?;
    let len = u16::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&len.to_be_bytes(), bytes].concat()).await?;
    let len = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(len)];
    stream.read_exact(&mut answer).await?;
    decode(&answer, question)
}

/// The address that the host's routes choose towards `server`, with no port.
///
/// A socket that is bound to it is left alone by the programs on this host's sockets, which lead an unbound one into the
/// mesh when `server` is the host's own (127.0.0.53, say) and its port is published. They know no port 0.
async fn source_for(server: SocketAddr) -> io::Result<SocketAddr> {
    let socket = UdpSocket::bind(unbound(server)).await?;
    let mut nowhere = server;
    nowhere.set_port(0);
    socket.connect(nowhere).await?;
    let mut source = socket.local_addr()?;
    source.set_port(0);
    Ok(source)
}

/// No address and no port, in the family of `server`.
fn unbound(server: SocketAddr) -> SocketAddr {
    let any = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(any, 0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::TcpListener;

    use super::super::question::tests::question;
    use super::*;

    async fn heard(udp: &UdpSocket) -> (Message, SocketAddr) {
        let mut buffer = [0; 512];
        let (len, client) = udp.recv_from(&mut buffer).await.unwrap();
        (Message::from_vec(&buffer[..len]).unwrap(), client)
    }

    #[tokio::test]
    async fn a_resolver_is_asked_by_tcp_when_its_answer_is_cut_short() {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let server = udp.local_addr().unwrap();
        let tcp = TcpListener::bind(server).await.unwrap();
        tokio::spawn(async move {
            let (asked, client) = heard(&udp).await;
            let mut answer = asked.into_response();
            answer.metadata.truncation = true;
            udp.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
            let (mut stream, _) = tcp.accept().await.unwrap();
            let mut asked = vec![0; usize::from(stream.read_u16().await.unwrap())];
            stream.read_exact(&mut asked).await.unwrap();
            let answer = Message::from_vec(&asked).unwrap().into_response().to_vec().unwrap();
            stream.write_u16(u16::try_from(answer.len()).unwrap()).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        });
        let answer = exchange(server, &question("example.com.")).await.unwrap();
        assert!(!answer.metadata.truncation);
    }

    #[tokio::test]
    async fn a_resolver_without_edns_is_asked_without() {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let server = udp.local_addr().unwrap();
        tokio::spawn(async move {
            for code in [ResponseCode::FormErr, ResponseCode::NoError] {
                let (mut asked, client) = heard(&udp).await;
                assert_eq!(asked.edns.is_some(), code == ResponseCode::FormErr);
                asked.edns = None;
                let mut answer = asked.into_response();
                answer.metadata.response_code = code;
                udp.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
            }
        });
        let answer = exchange(server, &question("example.com.")).await.unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    }

    /// What another socket sends is not even heard; what the server sends before the answer is passed over. A lost
    /// datagram is sent again.
    #[tokio::test]
    async fn forgeries_and_losses_only_cost_time() {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let server = udp.local_addr().unwrap();
        tokio::spawn(async move {
            let _lost = heard(&udp).await;
            let (asked, client) = heard(&udp).await;
            let answer = asked.clone().into_response();
            let mut forged = answer.clone();
            forged.metadata.response_code = ResponseCode::NXDomain;
            let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            stranger.send_to(&forged.to_vec().unwrap(), client).await.unwrap();
            forged.metadata.id ^= 1;
            udp.send_to(&forged.to_vec().unwrap(), client).await.unwrap();
            udp.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
        });
        let answer = timeout(Duration::from_secs(5), exchange(server, &question("example.com."))).await;
        assert_eq!(answer.unwrap().unwrap().metadata.response_code, ResponseCode::NoError);
    }

    /// From the resolver's own address to the very port, under every other id but the right one.
    #[tokio::test]
    async fn none_of_a_hundred_thousand_forged_answers_is_believed() {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let server = udp.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut asked, mut client) = heard(&udp).await;
            let mut forged = asked.clone().into_response();
            forged.metadata.response_code = ResponseCode::NXDomain;
            for number in 0..100_000_u32 {
                forged.metadata.id = asked.metadata.id.wrapping_add((number % 65_535 + 1) as u16);
                udp.send_to(&forged.to_vec().unwrap(), client).await.unwrap();
                if number % 32 == 0 {
                    // Its socket holds some hundred.
                    tokio::task::yield_now().await;
                }
            }
            loop {
                udp.send_to(&asked.into_response().to_vec().unwrap(), client).await.unwrap();
                // If there was no room for the true one either.
                (asked, client) = heard(&udp).await;
            }
        });
        let answer = exchange(server, &question("example.com.")).await.unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    }

    #[tokio::test]
    async fn questions_leave_from_ports_at_random_and_under_ids_at_random() {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let server = udp.local_addr().unwrap();
        let seen = tokio::spawn(async move {
            let mut seen = Vec::new();
            for _ in 0..8 {
                let (asked, client) = heard(&udp).await;
                seen.push((asked.metadata.id, client.port()));
                udp.send_to(&asked.into_response().to_vec().unwrap(), client).await.unwrap();
            }
            seen
        });
        for _ in 0..8 {
            exchange(server, &question("example.com.")).await.unwrap();
        }
        let (mut ids, mut ports): (Vec<_>, Vec<_>) = seen.await.unwrap().into_iter().unzip();
        for numbers in [&mut ids, &mut ports] {
            numbers.sort_unstable();
            numbers.dedup();
            assert!(numbers.len() > 5, "{numbers:?}");
        }
    }

    #[tokio::test]
    async fn a_socket_is_bound_to_the_address_that_routes_choose() {
        for (server, expected) in
            [("127.0.0.53:53", "127.0.0.1:0"), ("127.0.0.1:53", "127.0.0.1:0"), ("[::1]:53", "[::1]:0")]
        {
            let source = source_for(server.parse().unwrap()).await.unwrap();
            assert_eq!(source, expected.parse().unwrap(), "{server}");
        }
    }
}
