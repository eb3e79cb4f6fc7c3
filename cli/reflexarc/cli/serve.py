"""``reflexarc serve``, also ``serve-policy``: a policy behind websocket and HTTP."""

from __future__ import annotations

import gc
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.serve_replicas import absolute, replaced_on_hangup, replicated
from reflexarc.cli.serve_source import of_checkpoint, of_policy

if TYPE_CHECKING:
    from reflexarc.contract import PolicyContract


class LogFormat(str, Enum):
    TEXT = "text"
    JSON = "json"


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    checkpoint: Annotated[
        Path | None,
        # readable=False, here and below: what cannot be read is said by name, with the mend.
        typer.Option("--ckpt", "--checkpoint", help="Folder that training wrote.", readable=False),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="random, zero, a class of your own as module:Class (found from the current "
            "directory too), or the name of an installed package's policy.",
        ),
    ] = None,
    policy_config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", readable=False, help="JSON or YAML: keyword arguments of your class."
        ),
    ] = None,
    contract: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            readable=False,
            help="Contract of random and zero: a checkpoint's policy.json, or what GET "
            "/v1/contract answers; LIBERO's without it.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    device: Annotated[
        str, typer.Option(help="Of a checkpoint: auto, cpu, cuda, cuda:1 or mps.")
    ] = "auto",
    denoising_steps: Annotated[
        int | None,
        typer.Option(
            help="Of a checkpoint: Euler steps where a request names none.", min=1, max=100
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            help="Observations of several clients that share a forward pass, at most; 4 on a CPU "
            "and 32 on an accelerator without it.",
            min=1,
            max=256,
        ),
    ] = None,
    compile_mode: Annotated[
        str,
        typer.Option(
            "--compile",
            metavar="MODE",
            help="Of a checkpoint: auto, off, or graph: CUDA graphs at batch sizes that are powers "
            "of two. auto takes them on CUDA where the family can.",
        ),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            help="Of a checkpoint: fp32, or bf16 where the family computes in it: half the memory."
        ),
    ] = "fp32",
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of torch; all cores of this process by default.", min=1),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of an episode's noise where requests name none; without it every one is drawn.",
            min=0,
            max=2**53,
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the newest requests and answers there, for reflexarc query --replay.",
        ),
    ] = None,
    record_limit_mb: Annotated[
        float, typer.Option(help="Of that directory; the oldest segment goes first.", min=1)
    ] = 1024,
    page_hosts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Who besides this machine sees the status page: a client's address or network "
            "(10.0.0.0/8), or a name under which browsers reach this server. Repeatable.",
        ),
    ] = None,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            readable=False,
            help="API keys of which clients have to send one, one a line; also from the "
            "environment's REFLEXARC_API_KEYS, comma separated.",
        ),
    ] = None,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", readable=False, help="PEM; the port then speaks wss:// and https://."
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", readable=False, help="PEM, where the certificate's file has it not."
        ),
    ] = None,
    max_connections: Annotated[
        int, typer.Option(help="At once, websockets and HTTP together.", min=1)
    ] = 256,
    log_format: Annotated[
        LogFormat,
        typer.Option(help="Of what is logged to stderr: text, or one JSON object a line."),
    ] = LogFormat.TEXT,
    replicas: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Processes that each hold the policy, on Ray Serve: a number, or a range such as "
            "1-8 that follows the queue. SIGHUP replaces them one by one.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Ray cluster for the replicas: host:port, or auto for this machine's; without it "
            "one is started here.",
        ),
    ] = None,
    gpus_per_replica: Annotated[
        float | None,
        typer.Option(help="1 with --device cuda, else 0; 0.5 puts two on a GPU.", min=0),
    ] = None,
    app_name: Annotated[
        str, typer.Option(help="Of the replicas in the Ray cluster; one for each server.")
    ] = "reflexarc",
) -> None:
    """Serve a policy as action chunks until Ctrl-C or SIGTERM."""
    require("serve-policy", "server", "fastapi", "uvicorn")
    from reflexarc.server.api_keys import read_api_keys
    from reflexarc.server.inference import handshake
    from reflexarc.server.lifecycle import PolicyServer, open_port
    from reflexarc.server.logs import configure_logging
    from reflexarc.server.protection import Protection
    from reflexarc.server.recording import Recorder
    from reflexarc.server.service import PolicyService

    configure_logging(log_format.value)
    protection = Protection(
        read_api_keys(api_keys_file), tls_certificate, tls_key, max_connections=max_connections
    )
    cluster = None
    if replicas is not None or ray is not None:
        from reflexarc.server.replicas.source import ReplicaSource

        cluster, source = replicated(
            ReplicaSource(
                absolute(checkpoint), policy, Path.cwd(), absolute(policy_config),
                absolute(contract), device, denoising_steps, max_batch, compile_mode, threads,
                precision,
            ),
            replicas, ray, gpus_per_replica, app_name,
        )  # fmt: skip
    elif checkpoint is not None:
        source = of_checkpoint(
            checkpoint, policy, policy_config, contract, device, denoising_steps, max_batch,
            compile_mode, threads, precision,
        )  # fmt: skip
    else:
        source = of_policy(policy, policy_config, contract, device, denoising_steps)
    recorder = None if record is None else Recorder(record, limit_mb=record_limit_mb)
    listener = open_port(host, port)
    if cluster is not None:
        cluster.join()
    address = _address(host, int(listener.getsockname()[1]))
    on_device = f" on {source.device}" if source.device else ""
    s = "s" if protection.is_encrypted else ""
    typer.echo(f"Serving {source.title} at ws{s}://{address} and http{s}://{address}{on_device}")
    if source.contract is not None:
        typer.echo(f"Contract: {describe(source.contract)}")
    typer.echo(
        "Try next, in another terminal:\n"
        f"  reflexarc query --server ws{s}://{address}\n"
        f"  reflexarc eval libero --server ws{s}://{address} --suite libero_object --tasks 0\n"
        f"See what it does: http{s}://{address}/"
    )
    if protection.keys:
        typer.echo(f"Clients need one of {len(protection.keys)} API keys, in REFLEXARC_API_KEY.")
    if warning := protection.warning(str(listener.getsockname()[0])):
        typer.secho(f"warning: {warning}", fg=typer.colors.YELLOW, err=True)
    listeners = () if recorder is None else (recorder,)
    if cluster is None:
        service = PolicyService(
            source.load, default_seed=seed, max_batch=max_batch, listeners=listeners
        )
    else:
        from reflexarc.server.replicas.forwarder import Forwarder

        service = PolicyService(
            source.load,
            default_seed=seed,
            max_waiting=cluster.max_waiting,
            listeners=listeners,
            make_queue=Forwarder,
        )

    def announce() -> None:
        if source.contract is None:
            typer.echo(f"Contract: {describe(service.inference.contract)}")
        if recorder is not None:
            recorder.start(handshake(service.inference))
        _announce_ready()

    with replaced_on_hangup(cluster):
        PolicyServer(
            service, on_ready=announce, page_hosts=page_hosts or (), protection=protection
        ).run([listener])
    if recorder is not None:
        recorder.close()
    if service.load_error is not None:
        raise service.load_error


def _announce_ready() -> None:
    # What was loaded stays: leave it out of every later garbage collection, which otherwise
    # walks all of torch's objects in the middle of some request.
    gc.collect()
    gc.freeze()
    typer.echo("Ready. Ctrl-C ends it.")


def describe(contract: PolicyContract) -> str:
    """The contract in one line."""
    cameras = " + ".join(
        f"{camera.name} {camera.height}x{camera.width} {camera.orientation}"
        for camera in contract.cameras
    )
    language = ", an instruction" if contract.needs_language else ""
    action = contract.action
    return (
        f"{contract.family}: {cameras}, state {contract.state.layout}{language} -> "
        f"{action.horizon} actions of {action.dimension} ({action.kind}, {action.control_hz:g} Hz)"
    )


def _address(host: str, port: int) -> str:
    """What a person on this machine types; a wildcard address is reached by loopback."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"[{shown}]:{port}" if ":" in shown and not shown.startswith("[") else f"{shown}:{port}"
