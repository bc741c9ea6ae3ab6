//! Asking the agent on its socket, as the `docker` command line does.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::agent::SOCKET;

/// How long the agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the agent says where it refuses.
#[derive(Deserialize)]
struct Refusal {
    message: String,
}

/// Posts to a path of the agent whose run folder this is; its answer's body.
pub(crate) fn post(run_dir: &Path, path: &str) -> Result<Bytes> {
    send(run_dir, Method::POST, path, "")
}

/// Asks the agent whose run folder this is, with JSON if there is any to say; its answer's body.
pub(crate) fn send(run_dir: &Path, method: Method, path: &str, json: &str) -> Result<Bytes> {
    let body = (!json.is_empty()).then(|| ("application/json", Bytes::from(json.to_owned())));
    exchange(run_dir, method, path, body, PATIENCE)
}

/// Posts bytes to a path of the agent whose run folder this is, which may take so long; its answer's body.
pub(crate) fn post_bytes(run_dir: &Path, path: &str, bytes: Bytes, patience: Duration) -> Result<Bytes> {
    exchange(run_dir, Method::POST, path, Some(("application/octet-stream", bytes)), patience)
}

/// A text as a part of a path, or a value of a query: what is no id or name becomes one that nothing has.
pub(crate) fn escaped(wanted: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let byte = |byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    wanted.bytes().map(byte).collect()
}

/// What is said, and of what type that is.
type Said = Option<(&'static str, Bytes)>;

fn exchange(run_dir: &Path, method: Method, path: &str, body: Said, patience: Duration) -> Result<Bytes> {
    let asked = runtime()?.block_on(async {
        timeout(patience, async { whole(ask(run_dir, method, path, body).await?).await }).await
    });
    asked.with_context(|| late(patience))?
}

/// Asks the agent whose run folder this is for a stream of lines, and has each taken as it comes, until `take` wants no more
/// or the stream ends.
pub(crate) fn follow(run_dir: &Path, path: &str, mut take: impl FnMut(&str) -> Result<bool>) -> Result<()> {
    runtime()?.block_on(async {
        let asked = timeout(PATIENCE, ask(run_dir, Method::GET, path, None)).await;
        let mut stream = asked.with_context(|| late(PATIENCE))??.into_body();
        let mut rest = Vec::new();
        loop {
            let frame = timeout(PATIENCE, stream.frame()).await;
            let silent = || format!("nothing was heard of the agent for {} s", PATIENCE.as_secs());
            let Some(frame) = frame.with_context(silent)? else { return Ok(()) };
            let Ok(piece) = frame.context("the agent's answer ends early")?.into_data() else { continue };
            rest.extend_from_slice(&piece);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                let line = std::str::from_utf8(&line[..end]).context("the agent's answer is no text")?;
                if !take(line)? {
                    return Ok(());
                }
            }
        }
    })
}

fn runtime() -> Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("can't start the runtime")
}

fn late(patience: Duration) -> String {
    format!("the agent does not answer within {} s", patience.as_secs())
}

/// What the agent answers, unless it refuses.
async fn ask(run_dir: &Path, method: Method, path: &str, body: Said) -> Result<Response<Incoming>> {
    let socket = run_dir.join(SOCKET);
    let stream = match UnixStream::connect(&socket).await {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            bail!("{} may be dialled by root and its group alone", socket.display());
        }
        Err(error) => {
            return Err(error).with_context(|| {
                let socket = socket.display();
                format!("no agent answers at {socket}: start it, or name its folder with --run-dir")
            });
        }
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the sender; what goes wrong on it, the sender says.
    tokio::spawn(connection);
    let mut request = Request::builder().method(method).uri(path).header(HOST, "localhost");
    if let Some((media_type, _)) = &body {
        request = request.header(CONTENT_TYPE, *media_type);
    }
    let bytes = body.map(|(_, bytes)| bytes).unwrap_or_default();
    let request = request.body(Full::new(bytes))?;
    let answer = sender.send_request(request).await.context("the agent does not answer")?;
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    match serde_json::from_slice::<Refusal>(&whole(answer).await?) {
        Ok(Refusal { message }) => bail!(message),
        Err(_) => bail!("the agent answers {status}"),
    }
}

async fn whole(answer: Response<Incoming>) -> Result<Bytes> {
    Ok(answer.into_body().collect().await.context("the agent's answer ends early")?.to_bytes())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Asks an agent that answers so.
    fn asked(answer: &'static str) -> (Result<Bytes>, Vec<String>) {
        of(answer, |run_dir| post(run_dir, "/shoal/v1/networks/rotate-keys"))
    }

    /// What becomes of a question to an agent that answers so, and the question's head.
    fn of<T>(answer: &'static str, ask: impl FnOnce(&Path) -> T) -> (T, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let agent = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
            let head = lines.take_while(|line| !line.is_empty()).collect();
            stream.write_all(answer.as_bytes()).unwrap();
            head
        });
        (ask(dir.path()), agent.join().unwrap())
    }

    #[test]
    fn lines_are_taken_as_they_come_until_there_are_enough() {
        let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
            4\r\none\n\r\n3\r\ntwo\r\n7\r\n\nthree\n\r\n0\r\n\r\n";
        for (enough, expected) in [(9, &["one", "two", "three"][..]), (2, &["one", "two"])] {
            let mut lines = Vec::new();
            let take = |line: &str| {
                lines.push(line.to_owned());
                Ok(lines.len() < enough)
            };
            let (followed, head) = of(answer, |run_dir| follow(run_dir, "/shoal/v1/watch?since=7", take));
            followed.unwrap();
            assert_eq!(
                (lines.as_slice(), head[0].as_str()),
                (
                    &expected.iter().map(ToString::to_string).collect::<Vec<_>>()[..],
                    "GET /shoal/v1/watch?since=7 HTTP/1.1"
                )
            );
        }
        let gone = "HTTP/1.1 410 Gone\r\nContent-Length: 27\r\n\r\n{\"message\":\"list it again\"}";
        let (followed, _) = of(gone, |run_dir| follow(run_dir, "/shoal/v1/watch", |_| Ok(true)));
        assert_eq!(followed.unwrap_err().to_string(), "list it again");
    }

    #[test]
    fn the_answer_is_returned_and_a_refusal_is_an_error() {
        let (answer, head) =
            asked("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n");
        assert_eq!(answer.unwrap(), "{}");
        assert_eq!(head[0], "POST /shoal/v1/networks/rotate-keys HTTP/1.1");

        let refusal = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 34\r\n\r\n{\"message\":\"not a swarm manager.\"}";
        assert_eq!(asked(refusal).0.unwrap_err().to_string(), "not a swarm manager.");
        let odd = "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n";
        assert!(asked(odd).0.unwrap_err().to_string().contains("502"));
        assert!(asked("").0.unwrap_err().to_string().contains("does not answer"));
    }

    #[test]
    fn names_are_one_part_of_a_path() {
        assert_eq!(escaped("db-1.front_x"), "db-1.front_x");
        assert_eq!(escaped("a/../b?c %é"), "a%2F..%2Fb%3Fc%20%25%C3%A9");
        assert_eq!(escaped("[fd00::1]&x=é"), "%5Bfd00%3A%3A1%5D%26x%3D%C3%A9");
    }

    #[test]
    fn where_no_agent_is_the_remedy_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let error = post(dir.path(), "/").unwrap_err().to_string();
        assert!(error.contains("no agent answers at") && error.contains("--run-dir"), "{error}");
    }
}
