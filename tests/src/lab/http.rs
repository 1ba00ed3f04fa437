//! A request to an HTTP server in a lab, for services whose interface is JSON over HTTP.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::netns::Netns;

/// An answer: its status code and body.
#[derive(Debug, Clone)]
pub struct Answer {
    /// 200 and so on.
    pub status: u16,
    /// The body as JSON; `null` if it is none.
    pub body: Value,
    /// The body as it came.
    pub text: String,
}

/// Posts JSON from inside `ns` and waits for the whole answer, at most `within`.
pub fn post(
    ns: &Netns,
    server: SocketAddr,
    path: &str,
    body: &Value,
    within: Duration,
) -> Result<Answer> {
    let began = Instant::now();
    let left = || {
        within
            .checked_sub(began.elapsed())
            .filter(|left| !left.is_zero())
            .with_context(|| format!("no answer from {server} within {within:?}"))
    };
    let mut stream = ns.enter(|| {
        TcpStream::connect_timeout(&server, within).with_context(|| format!("connect to {server}"))
    })?;
    let body = body.to_string();
    // HTTP/1.0: the answer ends where the connection does, and is not chunked.
    let request = format!(
        "POST {path} HTTP/1.0\r\nHost: {server}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.set_write_timeout(Some(left()?))?;
    stream
        .write_all(request.as_bytes())
        .with_context(|| format!("sending a request to {server}"))?;
    let mut bytes = Vec::new();
    let mut chunk = [0; 16_384];
    loop {
        stream.set_read_timeout(Some(left()?))?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(got) => bytes.extend_from_slice(&chunk[..got]),
            Err(error) => {
                return Err(error).with_context(|| format!("waiting for {server}'s answer"));
            }
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        bail!("{server} did not answer in HTTP: {text:?}");
    };
    let status = head
        .split_whitespace()
        .nth(1)
        .and_then(|code| code.parse().ok())
        .with_context(|| format!("{server} answered without a status: {head:?}"))?;
    Ok(Answer {
        status,
        body: serde_json::from_str(body).unwrap_or(Value::Null),
        text: body.to_owned(),
    })
}
