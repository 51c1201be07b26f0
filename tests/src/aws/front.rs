//! HTTP in front of moto.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::{Call, Fault, Shared, gaps};

const LARGEST: usize = 1 << 20;

/// Status and body.
pub(super) type Answer = (u16, String);
/// Parameters of a call.
pub(super) type Parameters = [(String, String)];

/// The connection is to be closed without an answer.
#[derive(Debug, thiserror::Error)]
#[error("no answer on purpose")]
struct NoAnswer;

pub(super) fn start(shared: Arc<Shared>, stopped: oneshot::Receiver<()>) -> (SocketAddr, JoinHandle<()>) {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    listener.set_nonblocking(true).expect("a socket can be made non-blocking");
    let address = listener.local_addr().expect("a listener has an address");
    let thread = std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts");
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener).expect("the listener is usable");
            tokio::select! {
                () = accept(listener, shared) => {}
                _ = stopped => {}
            }
        });
    });
    (address, thread)
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = service_fn(|request| serve(Arc::clone(&shared), request));
            // Ends with an error when no answer is wanted, and when a client goes away.
            let _ended = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn serve(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, NoAnswer> {
    let (head, body) = request.into_parts();
    // What asks for the caller's own address.
    if head.method == hyper::Method::GET {
        return Ok(answer((200, "203.0.113.7\n".to_owned())));
    }
    let body = Limited::new(body, LARGEST).collect().await.map_err(|_| NoAnswer)?.to_bytes();
    let text = |name: &str| head.headers.get(name).and_then(|it| it.to_str().ok()).unwrap_or_default();
    let target = text("x-amz-target").to_owned();
    let (action, parameters) = match target.rsplit_once('.') {
        Some((_, action)) => (action.to_owned(), json_parameters(&body)?),
        None => form_parameters(&body)?,
    };
    // Credential=KEY/DATE/REGION/SERVICE/aws4_request
    let mut scope = text("authorization").split("Credential=").nth(1).unwrap_or_default().split('/').skip(2);
    let region = scope.next().unwrap_or_default().to_owned();
    let service = scope.next().unwrap_or_default().to_owned();
    let invocation = text("amz-sdk-invocation-id").to_owned();
    let json = (!target.is_empty()).then_some((target, body));
    let call = Call { action, parameters, region, invocation, json };

    let fault = record(&shared, &call);
    match fault {
        Some(Fault::Refused(status, code, message)) => {
            return Ok(answer(gaps::refusal(&service, status, code, message)));
        }
        Some(Fault::Unanswered) => return Err(NoAnswer),
        Some(Fault::HeldBefore) => return hold(&shared).await,
        _ => {}
    }
    let answered = gaps::carry_out(&shared, &service, &call).await;
    match fault {
        Some(Fault::AnswerLost | Fault::FirstAnswerLost) => Err(NoAnswer),
        Some(Fault::HeldAfter) => hold(&shared).await,
        _ => Ok(answer(answered)),
    }
}

/// Action and parameters of the older services.
fn form_parameters(body: &Bytes) -> Result<(String, Vec<(String, String)>), NoAnswer> {
    let mut parameters: Vec<(String, String)> = serde_urlencoded::from_bytes(body).map_err(|_| NoAnswer)?;
    let action = parameters.iter().position(|(name, _)| name == "Action");
    let action = action.map(|index| parameters.remove(index).1).unwrap_or_default();
    parameters.retain(|(name, _)| name != "Version");
    Ok((action, parameters))
}

/// Parameters of the newer ones; what is no text is shown as JSON.
fn json_parameters(body: &Bytes) -> Result<Vec<(String, String)>, NoAnswer> {
    let fields: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(body).map_err(|_| NoAnswer)?;
    let text = |value: serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    Ok(fields.into_iter().map(|(name, value)| (name, text(value))).collect())
}

/// Keeps the call and finds its fault. Repetitions of one call share number and fault.
fn record(shared: &Shared, call: &Call) -> Option<Fault> {
    let mut inner = shared.inner();
    let before =
        inner.calls.iter().position(|it| it.invocation == call.invocation && !it.invocation.is_empty());
    let number = before.unwrap_or_else(|| {
        inner.calls.push(call.clone());
        inner.calls.len() - 1
    });
    let fault = inner.faults.iter().find(|(at, _)| *at == number).map(|(_, fault)| *fault);
    fault.filter(|fault| *fault != Fault::FirstAnswerLost || before.is_none())
}

async fn hold(shared: &Shared) -> Result<Response<Full<Bytes>>, NoAnswer> {
    // Fails only when the test is over.
    let _over = shared.hold.send(());
    std::future::pending().await
}

fn answer((status, body): Answer) -> Response<Full<Bytes>> {
    let kind = if body.starts_with('{') { "application/x-amz-json-1.1" } else { "text/xml;charset=UTF-8" };
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = StatusCode::from_u16(status).expect("the statuses here are valid");
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    answer
}

/// Passes a call on to moto.
pub(super) async fn ask(
    shared: &Shared,
    region: &str,
    service: &str,
    action: &str,
    parameters: &Parameters,
) -> Answer {
    let version = match service {
        "sts" => "2011-06-15",
        "iam" => "2010-05-08",
        _ => "2016-11-15",
    };
    let mut form = vec![("Action", action), ("Version", version)];
    form.extend(parameters.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    let body = serde_urlencoded::to_string(form).expect("text pairs are a form");
    let request = shared.client.post(&shared.moto);
    let request = request.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
    send(request.header(header::AUTHORIZATION, scope(region, service)).body(body)).await
}

/// Asks Systems Manager for a public parameter.
pub(super) async fn parameter(shared: &Shared, region: &str, name: &str) -> Option<String> {
    let body = serde_json::json!({ "Name": name }).to_string().into();
    let (_, body) = ask_json(shared, region, "ssm", "AmazonSSM.GetParameter", body).await;
    let answer: serde_json::Value = serde_json::from_str(&body).ok()?;
    Some(answer["Parameter"]["Value"].as_str()?.to_owned())
}

/// Passes a call of a newer service on to moto.
pub(super) async fn ask_json(
    shared: &Shared,
    region: &str,
    service: &str,
    target: &str,
    body: Bytes,
) -> Answer {
    let request = shared.client.post(&shared.moto);
    let request = request.header(header::CONTENT_TYPE, "application/x-amz-json-1.1");
    let request = request.header("x-amz-target", target);
    send(request.header(header::AUTHORIZATION, scope(region, service)).body(body)).await
}

fn scope(region: &str, service: &str) -> String {
    format!(
        "AWS4-HMAC-SHA256 Credential=a/20260101/{region}/{service}/aws4_request, SignedHeaders=host, Signature=0"
    )
}

async fn send(request: reqwest::RequestBuilder) -> Answer {
    let answer = request.send().await.expect("moto answers");
    let status = answer.status().as_u16();
    (status, answer.text().await.expect("moto's answer is text"))
}
