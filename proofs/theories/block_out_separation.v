(** Steering after the skip can depend on inputs that steering before it never sees

    A block without its norm: block output h = u + y(u), y a gated MLP.

    Claims.
      - A steer at mlp_out reads u only through y(u): two inputs with the same y get
        the same steer.
      - With W_d = 0 every steer at mlp_out is a constant vector; the bias-free
        Up ψ(Down y) with ψ(0) = 0 is 0 whatever Up and Down are, so no gradient
        reaches them.
      - With W_d = 0 the target u -> u + B u, for any B other than 0, is reached by a
        linear steer at block_out and by no steer at mlp_out, of any form.

    Not said here.  W_d = 0 is an extreme case; in a trained model the two sites
    differ by degree.  See block_out_replication.v and residual_covariance.v. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics glu_expansion.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Separation.
Variables (F : fieldType) (d n : nat) (phi : F -> F).
Variables (Wg Wu : 'M[F]_(n, d)) (Wd : 'M[F]_(d, n)).
Implicit Types (u : 'cV[F]_d) (steer : 'cV[F]_d -> 'cV[F]_d).

Let y := glu phi Wg Wu Wd.

(** Block output with a steer that reads and writes the MLP output. *)
Definition steered_mlp_out steer u := u + (y u + steer (y u)).

(** Block output with a steer that reads and writes the block output. *)
Definition steered_block_out steer u := u + y u + steer (u + y u).

(** Inputs whose hidden activations differ by an element of ker(W_d) get the same
    steer at mlp_out. *)
Theorem mlp_out_blind steer u1 u2 :
  Wd *m (gate phi (Wg *m u1) (Wu *m u1) - gate phi (Wg *m u2) (Wu *m u2)) = 0 ->
  steer (y u1) = steer (y u2).
Proof. by move/eqP; rewrite mulmxBr subr_eq0 => /eqP E; rewrite /y /glu E. Qed.

(** With W_d = 0 a steer at mlp_out is constant. *)
Theorem mlp_out_constant steer u1 u2 : Wd = 0 -> steer (y u1) = steer (y u2).
Proof. by move=> Wd0; apply: mlp_out_blind; rewrite Wd0 mul0mx. Qed.

(** With W_d = 0 a steer Up ψ(Down y) without biases, ψ(0) = 0, is 0. *)
Theorem bias_free_steer_is_dead k (psi : 'cV[F]_k -> 'cV[F]_k)
    (Up : 'M[F]_(d, k)) (Down : 'M[F]_(k, d)) u :
  Wd = 0 -> psi 0 = 0 -> Up *m psi (Down *m y u) = 0.
Proof. by move=> Wd0 psi0; rewrite /y /glu Wd0 mul0mx mulmx0 psi0 mulmx0. Qed.

(** With W_d = 0, u -> u + B u is reached at block_out and not at mlp_out. *)
Theorem separation (B : 'M[F]_d) : Wd = 0 -> B != 0 ->
  (forall u, steered_block_out (mulmx B) u = u + B *m u)
  /\ ~ (exists steer, forall u, steered_mlp_out steer u = u + B *m u).
Proof.
move=> Wd0 B0; have y0 u : y u = 0 by rewrite /y /glu Wd0 mul0mx.
split=> [u|[steer E]]; first by rewrite /steered_block_out y0 addr0.
have cst u : B *m u = steer 0.
  by apply: (addrI u); rewrite -E /steered_mlp_out y0 add0r.
case/negP: B0; apply/eqP/mulmx_inj => u.
by rewrite mul0mx cst -(cst 0) mulmx0.
Qed.
End Separation.
