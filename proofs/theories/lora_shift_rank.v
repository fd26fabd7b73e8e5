(** The rank of the shifts that LoRA makes

    LoRA of rank r adds B A to one matrix: A has r rows, B has r columns.  Stack the
    shifts at the module's output over any set of tokens, from any contexts, as the
    columns of a matrix.

    Claims.
      - On W_o or W_d, whose input does not depend on the update: shifts B A M, rank at
        most r (M: the inputs, one token per column).
      - On W_v: shifts sum_h W_o^h B_h A X P_h over the query heads h, with P_h the
        attention weights and B_h the rows of B used by head h (shared between heads
        under grouped queries).  Rank at most
          min(d, heads * min(r, head_dim)).
      - One query head and r = 1: all shifts are multiples of one vector.

    Assumptions.  Local shifts: inputs X, M and weights P_h as in the base model.  That
    is exact for an update of one block that touches only the named matrix.

    Not said here.  Updates of W_q, W_k, W_g, W_u have no such bound; a norm after the
    module, or the next block, destroys it. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section LoraRank.
Variables (F : fieldType) (r : nat).

(** Shifts of W_o or W_d: rank(B A M) <= r. *)
Theorem output_shift_rank d n T (B : 'M[F]_(d, r)) (A : 'M[F]_(r, n)) (M : 'M[F]_(n, T)) :
  (\rank (B *m A *m M) <= r)%N.
Proof.
by rewrite (leq_trans (mxrankM_maxl _ _)) // (leq_trans (mxrankM_maxl _ _)) ?rank_leq_col.
Qed.

(** rank(sum_h S_h) <= heads * k when every rank(S_h) <= k. *)
Lemma rank_sum m n H k (S : 'I_H -> 'M[F]_(m, n)) :
  (forall h, (\rank (S h) <= k)%N) -> (\rank (\sum_h S h)%R <= H * k)%N.
Proof.
move=> Sk; elim: H S Sk => [|H' IH] S Sk; first by rewrite big_ord0 mxrank0.
rewrite big_ord_recl mulSn.
apply: leq_trans (mxrankS (addmx_sub_adds (submx_refl _) (submx_refl _))) _.
apply: leq_trans (mxrank_adds_leqif _ _).1 _.
by apply: leq_add; [exact: Sk|exact: IH].
Qed.

Variables (d n k T H : nat).
Variables (Wo : 'I_H -> 'M[F]_(d, k)) (B : 'I_H -> 'M[F]_(k, r)) (A : 'M[F]_(r, n)).
Variables (X : 'M[F]_(n, T)) (P : 'I_H -> 'M[F]_T).

(** Shifts at attn_out of an update B A of W_v. *)
Definition value_shift : 'M[F]_(d, T) := \sum_h Wo h *m (B h *m A) *m X *m P h.

(** rank <= min(d, heads * min(r, head_dim)) *)
Theorem value_shift_rank : (\rank value_shift <= minn d (H * minn r k))%N.
Proof.
rewrite leq_min rank_leq_row /=; apply: rank_sum => h; rewrite -!mulmxA.
rewrite (leq_trans (mxrankM_maxr _ _)) // (leq_trans (mxrankM_maxl _ _)) //.
by rewrite leq_min rank_leq_col rank_leq_row.
Qed.
End LoraRank.

(** One query head, rank 1: the shifts of any tokens are multiples of the vector W_o B. *)
Theorem value_shift_collinear (F : fieldType) d n k T (Wo : 'M[F]_(d, k))
    (B : 'cV[F]_k) (A : 'rV[F]_n) (X : 'M[F]_(n, T)) (P : 'M[F]_T) j :
  exists c, col j (Wo *m (B *m A) *m X *m P) = c *: (Wo *m B).
Proof.
exists ((A *m X *m P) 0 j); rewrite !colE -!mulmxA (mulmxA Wo).
rewrite [A *m _]mx11_scalar mul_mx_scalar; congr (_ *: _).
by rewrite !mulmxA -colE mxE.
Qed.
