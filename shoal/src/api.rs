//! Asking the agent on its socket, as the `docker` command line does.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::UnixStream;

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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    let asked = runtime.block_on(async {
        tokio::time::timeout(PATIENCE, ask(run_dir, method, path, json.to_owned())).await
    });
    asked.with_context(|| format!("the agent does not answer within {} s", PATIENCE.as_secs()))?
}

async fn ask(run_dir: &Path, method: Method, path: &str, json: String) -> Result<Bytes> {
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
    if !json.is_empty() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::new(Bytes::from(json)))?;
    let answer = sender.send_request(request).await.context("the agent does not answer")?;
    let status = answer.status();
    let body = answer.into_body().collect().await.context("the agent's answer ends early")?.to_bytes();
    if status.is_success() {
        return Ok(body);
    }
    match serde_json::from_slice::<Refusal>(&body) {
        Ok(Refusal { message }) => bail!(message),
        Err(_) => bail!("the agent answers {status}"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Asks an agent that answers so.
    fn asked(answer: &'static str) -> (Result<Bytes>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let agent = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
            let head = lines.take_while(|line| !line.is_empty()).collect();
            stream.write_all(answer.as_bytes()).unwrap();
            head
        });
        (post(dir.path(), "/shoal/v1/networks/rotate-keys"), agent.join().unwrap())
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
    fn where_no_agent_is_the_remedy_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let error = post(dir.path(), "/").unwrap_err().to_string();
        assert!(error.contains("no agent answers at") && error.contains("--run-dir"), "{error}");
    }
}
