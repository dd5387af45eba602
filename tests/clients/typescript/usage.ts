// A program of a user of the API, written against the generated types only. The test compiles it in strict mode; a line
// below `@ts-expect-error` must be refused, so types that have become `any` are noticed.
import createClient from "openapi-fetch";

import type { components, paths } from "./api";

type Job = components["schemas"]["JobRead"];
type Method = components["schemas"]["MethodDefinition"];
type Problem = components["schemas"]["Problem"];
type TrainingType = components["schemas"]["TrainingType"];

const client = createClient<paths>({ baseUrl: "http://127.0.0.1:8000" });

const finance: Method = {
  name: "finance-sft",
  training_type: "chat",
  technique: "sft",
  lifecycle: ["customized", "complete"],
  stages: {
    training: { file: "finance_sft.py", conda_env: "trl" },
    saving: { file: "merge.py", conda_env: "trl" },
  },
};

function explain(problem: Problem): string {
  const places = problem.errors.map((entry) => `${entry.pointer}: ${entry.detail}`);
  return [problem.code, problem.detail, ...places].join("\n");
}

export async function register(): Promise<string> {
  const { data, error } = await client.POST("/api/v1/methods", {
    params: { header: { "Idempotency-Key": "register-finance" } },
    body: finance,
  });
  if (error) throw new Error(explain(error));
  const type: TrainingType = data.training_type;
  return `${data.id} version ${data.version.toFixed()} of ${type}`;
}

export async function rename(method: string, etag: string): Promise<void> {
  const { error } = await client.PATCH("/api/v1/methods/{method}", {
    params: { path: { method }, header: { "If-Match": etag } },
    body: { description: "nothing but this changes" },
  });
  if (error) throw new Error(explain(error));
}

export async function train(): Promise<Job> {
  const { data, error } = await client.POST("/api/v1/jobs", {
    body: {
      method: "finance-sft",
      base_model: "tiny-base",
      dataset: "faq",
      through: "complete",
      parameters: { learning_rate: 2e-4 },
    },
  });
  if (error) throw new Error(explain(error));
  for (;;) {
    const job = await client.GET("/api/v1/jobs/{job}", { params: { path: { job: data.id } } });
    if (job.error) throw new Error(explain(job.error));
    switch (job.data.status) {
      case "succeeded":
        return job.data;
      case "failed":
      case "cancelled":
        throw new Error(job.data.reason_detail ?? job.data.status);
      default:
        await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

export async function lastLoss(job: string): Promise<number | null> {
  const { data, error } = await client.GET("/api/v1/jobs/{job}/metrics", {
    params: { path: { job }, query: { points: 100, names: ["loss"] } },
  });
  if (error) throw new Error(explain(error));
  const last = data.series[0]?.points.at(-1);
  return last?.[1] ?? null;
}

export async function* failedJobs(): AsyncGenerator<string> {
  let cursor: string | null = null;
  do {
    const page: { data?: components["schemas"]["JobSummaryPage"]; error?: Problem } = await client.GET("/api/v1/jobs", {
      params: { query: { status: ["failed"], sort: "-created_at", ...(cursor ? { cursor } : {}) } },
    });
    if (!page.data) throw new Error(page.error?.detail ?? "no answer");
    for (const job of page.data.items) yield `${job.name}: ${job.reason_detail ?? ""}`;
    cursor = page.data.next_cursor;
  } while (cursor !== null);
}

export async function ask(model: string, question: string): Promise<string> {
  const { data, error } = await client.POST("/api/v1/models/{model}/chat", {
    params: { path: { model } },
    headers: { Accept: "application/json" },
    body: { messages: [{ role: "user", content: question }] },
  });
  if (error) throw new Error(explain(error));
  return typeof data === "string" ? data : data.text;
}

export async function refusedByTheCompiler(): Promise<void> {
  // @ts-expect-error: there is no such address
  await client.GET("/api/v1/jobz");
  // @ts-expect-error: a job needs a method
  await client.POST("/api/v1/jobs", { body: { base_model: "tiny-base" } });
  // @ts-expect-error: the number of a page's items is a number
  await client.GET("/api/v1/jobs", { params: { query: { limit: "ten" } } });
  const { data } = await client.GET("/api/v1/jobs/{job}", { params: { path: { job: "1" } } });
  // @ts-expect-error: a job has no such member
  console.log(data?.colour);
}
